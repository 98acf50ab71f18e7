"""Which images of a pool are worth training on.

``choose`` ranks and selects, ``proxy`` makes the gradients and features that it ranks by.
"""
