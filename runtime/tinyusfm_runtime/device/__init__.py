"""What belongs to this machine and not to a bundle.

``machine`` describes the processor and pins threads, ``owned_files`` keeps private cache files that only their owner
can write, ``gate_record`` remembers what an artefact was found to do here.
"""
