"""Parts that sinks of dashboards share: pictures of heads, texts, and the choice of panels."""
