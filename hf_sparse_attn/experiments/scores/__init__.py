"""What single tasks measure: answers, classes, forecasts, perplexity beside dense runs, budgets that vary."""
