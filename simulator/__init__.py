"""The cluster on a virtual clock: the router's own core and policies, over a trace, with modelled nodes."""
