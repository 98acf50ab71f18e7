"""The bundle: one folder with artefacts, manifest, hashes and golden vectors.

``manifest`` is the strict format of ``manifest.json``, ``reader`` opens a folder and verifies every byte, ``writer``
publishes one atomically, ``golden`` compares an engine with the stored outputs, ``arrays`` reads stored arrays.
"""
