"""A probe without a probe: frames of a clip served live, at their rate, with faults on demand"""
