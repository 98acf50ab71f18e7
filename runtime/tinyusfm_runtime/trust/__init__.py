"""Who made a bundle, and whether it may run here.

Signatures, trusted keys, anti-rollback.

``envelope`` reads and checks a signature file of the OpenSSF model-signing layout (a DSSE envelope with an in-toto
statement in a sigstore bundle), ``statement`` is what was signed, ``store`` a folder of trusted public keys,
``rollback`` the floor below which no version opens, ``policy`` puts them together; it answers before an engine
sees a byte. Only ``cryptography`` is needed (extra ``signed``). Signing itself is not done here.
"""
