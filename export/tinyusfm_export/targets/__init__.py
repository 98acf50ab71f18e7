"""One file per target, by its short alias; ``openvino`` and ``onnx`` are what people type.

Listed without being imported (runtime/plugins.py).
"""
