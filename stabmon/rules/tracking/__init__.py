"""Keep readings and open issues over the steps of a run."""
