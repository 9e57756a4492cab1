"""What a person looks at outside of a terminal: `report`, contact sheets, and the pages of a search and of an audit."""

from __future__ import annotations

from msae.web.report.document import Report, report

__all__ = ["Report", "report"]
