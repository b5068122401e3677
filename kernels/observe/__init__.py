"""observe: keep the queries of watched tokens; the last `window` of them judge a compaction."""
