"""The commands that tell a user what is installed, whether it works here, and how exact it is."""
