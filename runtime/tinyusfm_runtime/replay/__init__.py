"""Replay: frames of a clip served live, as a probe would.

At their own rate, with faults on demand.
"""
