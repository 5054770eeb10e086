"""robosuite's tasks as robomimic uses them: environments, scripted experts, demonstrations, pictures."""
