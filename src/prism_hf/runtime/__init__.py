"""What any long job needs: whole files, checkpoints, locks, signals, logs, the Hub's client. Nothing here knows images."""
