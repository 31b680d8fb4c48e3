"""From an fx graph of ATen and qdiff:: operators to a model of OpenVINO's. Imported only where that is asked for."""
