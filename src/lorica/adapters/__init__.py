"""What an update is: a small linear-algebra library of low-rank updates that knows neither transformers nor tasks."""
