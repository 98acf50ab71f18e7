"""The arithmetic before and after the network.

Equal to the byte to ``runtime/capi``.

``preprocess`` turns a frame into the input tensor, ``postprocess`` logits into a mask or scores, ``measure`` a mask
into millimetres. ``native`` finds the compiled kernels; without them numpy computes the same bytes.
"""
