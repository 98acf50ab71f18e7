"""The change between two bundles: what, whether declared, and what it does.

``kinds`` sorts modifications, ``protocol`` reads what was declared beforehand, ``impact`` runs both bundles on the same
frames, ``assess`` judges, ``page`` shows it under the three headings of a predetermined change control plan.
"""
