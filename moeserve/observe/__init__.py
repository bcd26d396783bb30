"""What is watched while serving: metrics and recorded routing."""
