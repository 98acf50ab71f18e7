"""One inference library a file; the file's name is the engine's canonical name. See engine.py for the contract."""
