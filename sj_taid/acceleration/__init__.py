"""Less memory and time for SpikingJelly nets; README.md explains how."""
