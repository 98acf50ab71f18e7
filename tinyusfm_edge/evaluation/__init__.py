"""Accuracy of a model on labelled frames; it does not know training or export."""
