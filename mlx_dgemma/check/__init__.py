"""What a user runs on their own machine: is the port right there, and how fast is it?"""
