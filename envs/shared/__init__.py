"""What simulators share: worker processes, episodes, and sets that are made item by item."""
