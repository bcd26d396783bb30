"""What ranks send each other beside tokens: steps, heartbeats, identity; which rank is lost."""
