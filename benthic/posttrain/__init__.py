"""What makes an assistant of a pretrained model: fine-tuning on answers, and rewards."""
