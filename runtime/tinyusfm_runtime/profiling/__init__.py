"""What a profile holds beside the stages.

``card`` is what can be said before anything runs, ``quantiles`` what a sample can support, ``open_loop`` frames that
come at a rate, ``watch`` clocks, temperature and memory, ``energy`` joules per frame, ``operators`` time by operator
and the precision it ran in. numpy only; vendor libraries inside functions.
"""
