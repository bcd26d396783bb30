"""From loads and routing to a plan: searches, integer programs, baselines, bounds."""
