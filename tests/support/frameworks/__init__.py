"""RL frameworks and platform plugins, as they meet vLLM's LoRA: stand-ins in own code.

Each module has one project. ``packages.py`` lists the projects whose own function can take the place
of the stand-in's (``ci/frameworks.py``).
"""
