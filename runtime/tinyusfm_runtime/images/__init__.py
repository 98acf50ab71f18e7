"""Still image files: what kind a file is, its pixels, and the order of many.

The one decoder for PNG, JPEG, TIFF, GIF, WebP, BMP, JPEG 2000 and PNM: whatever reads an image file of these kinds
(live sources, tables of training images, masks) reads it here, so that one file gives one answer. It obeys what the
file says about its image (orientation, palette, transparency, grey polarity) and refuses what only the owner can
decide (16-bit and float codes without a window). It knows no folder, no mask rule and no model.
"""
