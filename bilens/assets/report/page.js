// Unpacks the plotting library, and draws each figure when it comes near the screen.
(async () => {
  const plots = [...document.querySelectorAll(".plot")];
  if (!("DecompressionStream" in window)) {
    plots.forEach((plot) => { plot.textContent = "Figures need a browser of 2023 or later; their numbers are in the tables."; });
    return;
  }
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
  // On a narrow screen labels come closer: those that would cover an earlier one, or leave the figure, are left out.
  const thin = (plot) => {
    const kept = [], edge = plot.getBoundingClientRect();
    for (const label of plot.querySelectorAll(".annotation")) {
      const box = (label.querySelector("text") ?? label).getBoundingClientRect();
      const covers = kept.some((one) => box.left < one.right && one.left < box.right && box.top < one.bottom && one.top < box.bottom);
      if (covers || box.left < edge.left || box.right > edge.right) label.style.display = "none"; else kept.push(box);
    }
  };
  const draw = (plot) => {
    const { data, layout } = JSON.parse(plot.nextElementSibling.textContent);
    const width = Math.min(layout.width, plot.parentElement.parentElement.clientWidth);
    Plotly.newPlot(plot, data, { ...layout, width }, { displayModeBar: false, responsive: false }).then(() => thin(plot));
  };
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
    }
  }, { rootMargin: "400px" });
  plots.forEach((plot) => seen.observe(plot));
  document.documentElement.dataset.ready = "true";
})();
