"""The export graph as ONNX files: float32, float16 and INT8.

``writer`` is the one place that makes ONNX nodes; ``half`` and ``int8`` change what it wrote. The ``onnx`` target and,
through conversion, the ``openvino`` target use them.
"""
