"""Requests to tokens: block pool, scheduler, executors, text, and the step loop."""
