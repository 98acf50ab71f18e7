"""Bytes on a wire, in shared memory or on a video device.

No images and no meaning.

OpenIGTLink messages and connections, the shared-memory ring and its writer, Video4Linux devices. Sources, sinks and
the replay of recorded clips build on it.
"""
