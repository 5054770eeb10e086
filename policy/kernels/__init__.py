"""Compiled code, a closed room: nothing outside needs to be read with it."""
