"""Studies: several runs that answer one question. Plain arguments in; knows neither config nor tasks."""
