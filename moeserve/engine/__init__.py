"""Requests to tokens: block pool, scheduler, executors, sampler, text, and the step loop."""
