"""What can be set: groups of options, where their values come from, whether they have an effect.

    options    every setting, declared once, in the group of those who use it
    steps      those of steps
    group      what a group is
    kinds      sizes, ports, counts, secrets: what settings are made of
    cluster    the settings of members and gateways, which find one another
    commands   all groups, and which command takes which
    sources    flags, environment and YAML file to options, and options to YAML and environment
    effect     refuses a setting that was given and would change nothing
    variables  the MOESERVE_ variables that are no settings
    reference  prints docs/settings.md

Knows nothing of models: what depends on the checkpoint is checked when it is loaded.
"""
