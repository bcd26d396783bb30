"""What ranks say to each other beside tokens: steps, heartbeats, identity, who is lost."""
