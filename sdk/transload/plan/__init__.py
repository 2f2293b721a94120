"""The deployment planner."""
