"""Fine-tuning, resumable, dense or through subnetworks."""
