"""LightningModules: what is learned from which loss, and the figures and pictures of a run."""
