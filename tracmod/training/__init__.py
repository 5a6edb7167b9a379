"""Fine-tuning: the loop, its optimizer and folder, and a callback for transformers' Trainer."""
