"""What can be set: groups of options, where their values come from, whether they have an effect.

``options`` declares every setting once; ``sources`` reads flags, environment and YAML; ``effect``
refuses what would be dropped; ``variables`` names the variables that are no settings;
``reference`` prints ``docs/settings.md``. Knows nothing of models: what depends on the checkpoint
is checked when it is loaded.
"""
