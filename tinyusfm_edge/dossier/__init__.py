"""The papers of one bundle: materials, SOUP list, model card, evidence, threats.

``facts`` gathers what is known, ``bom`` writes it as CycloneDX, ``soup`` as the list that IEC 62304 asks for,
``pages`` as pages that print. What only the manufacturer of a device can know is marked, never guessed.
"""
