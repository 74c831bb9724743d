// Draws the figures over their static images. If this cannot run, the images stay.
(() => {
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const config = { displayModeBar: false, responsive: true, doubleClick: "reset" };

  const draw = () => {
    for (const [key, themes] of Object.entries(plots)) {
      const figure = document.getElementById(key);
      const { data, layout } = structuredClone(themes[dark.matches ? "dark" : "light"]);
      layout.dragmode = touch ? false : "zoom"; // a finger scrolls the page
      figure.classList.add("drawn");
      const place = figure.querySelector(".plot");
      if (layout.meta.keyed || layout.margin.r > place.clientWidth / 3) { // no room for names beside the curves
        figure.classList.add("keyed");
        layout.annotations = layout.annotations.filter((label) => !label.xshift);
        layout.margin.r = 16;
      }
      Plotly.react(place, data, layout, config);
    }
  };

  draw();
  dark.addEventListener("change", draw);
})();
