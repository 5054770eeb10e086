"""Push-T: simulator, planner expert, demonstrations and label sets."""
