"""Another plan while serving: whether it pays, who proposes it, how it changes hands."""
