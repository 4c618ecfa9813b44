"""Pre-training on logged slates, in compiled epochs over data on the device."""
