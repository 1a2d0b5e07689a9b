"""Training from configs: LightningModules, a run's folder, its evaluation, the command line."""
