"""What ``profile`` measures beside the stages, here or on a device over SSH."""
