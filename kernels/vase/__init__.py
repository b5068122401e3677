"""What VaSE scores with: mean attention, and the range of values."""
