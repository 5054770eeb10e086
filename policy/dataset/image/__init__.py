"""Pictures from disk: sources by name or folder, decoding, augmentation."""
