"""The student: how it is built, what of it is trained, and how it is saved."""
